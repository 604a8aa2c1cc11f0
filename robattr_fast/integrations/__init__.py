"""robattr_fast in other libraries: transformers, timm, Captum, Quantus, one module each.

A module imports its library, so that a class can be the library's own; none is imported here.
"""
