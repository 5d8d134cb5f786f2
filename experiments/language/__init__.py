"""Language models of matched size on the same text: the models, their runs in sweeps, and a summary of the records."""
