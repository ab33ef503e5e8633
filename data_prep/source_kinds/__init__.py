"""One module for each kind of source, named as in ``sources[i].kind``; see data_prep.sources."""
