"""The kinds of faults that tests put into checkpoints, one module a group: names, orders, values, configs, files."""
