"""Pages in a real browser: `python -m tests.browser` says how; needs Chromium and axe-core, so the suite leaves it out."""
