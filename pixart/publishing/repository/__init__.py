"""The remote code of a published model. Each file is copied into a repository as it is and stands alone
there: it imports nothing of ours but pixart_kernels, and that only if it is installed."""
