"""Sound variants, a module a group: stored otherwise, trained further, other things beside the weights."""
