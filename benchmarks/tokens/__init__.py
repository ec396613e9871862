"""Tokenizers of 32x32 pictures: their data, teachers, training, auxiliary language losses and figures."""
