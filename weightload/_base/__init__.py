"""What the package stands on: paths, words, dtypes, exceptions that may be forgiven, torch as a new thread finds it."""
