"""MaskDM: masked diffusion priors. Images in, a trained denoiser out; nothing here knows about federation servers."""

__version__ = "0.1.0"
