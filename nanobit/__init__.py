"""The machinery that no paper is about: data, training, checkpoints, Hugging Face folders, text,
runs and their command line. A reader of the methods needs none of it."""
