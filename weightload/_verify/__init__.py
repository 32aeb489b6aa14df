"""``verify=``: digests of whole files, while they are loaded."""
