"""Evidence: what the checks measure, each module one kind of it; numpy only, streaming."""
