"""Calibration of a model through `transformers`: texts in, a `kvstore.codecs.Profile` out."""
