"""The pages in a real browser: needs Chromium and axe-core, so the suite leaves it out (`python -m tests.browser`)."""
