"""The ground of the package: paths, words, dtypes, exceptions that may be forgiven, torch as a new thread finds it."""
