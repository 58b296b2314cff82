"""Stands in for torchaudio, whose build needs CUDA: LLaMA-Factory imports it, and uses it for audio alone."""
