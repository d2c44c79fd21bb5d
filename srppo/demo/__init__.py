"""``srppo demo``: the whole method on a small generated world, in a few minutes on two cores. See :mod:`.world`."""
