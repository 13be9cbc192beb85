"""Sound variants of a model, one module a group: stored in other ways, trained further, with other files beside."""
