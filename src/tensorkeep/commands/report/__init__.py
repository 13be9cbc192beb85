"""Report: findings as one offline HTML page."""
