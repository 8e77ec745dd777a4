"""The study: small denoisers trained on the embedded world, and which claims of the paper hold there."""
