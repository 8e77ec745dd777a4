"""Which denoiser and which data scale: counted tables, fitted laws, and a study in the shapes world.

After "On the Scalability of Diffusion-based Text-to-Image Generation" (arXiv 2404.02883).
"""
