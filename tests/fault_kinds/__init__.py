"""The kinds of faults, a module a group: names, shapes, orders, values, configs, files."""
