"""Entropy coding: static tables (`book`), rANS for the CPU (`rans`) and for CUDA (`triton_rans`), and the oracle (`reference`)."""
