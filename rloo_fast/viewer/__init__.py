"""Files of runs in; a page to look at them out, live or as one file. Training reads none of it."""
