"""The service: one queue before one pipeline, and the page and the calls that reach it over HTTP."""
