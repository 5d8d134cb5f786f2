"""Language models of matched size on the same text: what is trained, in which sweeps, and what comes out."""
