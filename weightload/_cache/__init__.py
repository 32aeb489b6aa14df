"""``cache=``: a folder with copies of what servers have, written while they are loaded, and loaded from there."""
