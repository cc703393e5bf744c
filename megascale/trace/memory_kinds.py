"""Kinds of memory in a trace, in the order of reports."""

KINDS = ("weights", "gathered weights", "gradients", "reduce buffers", "optimizer", "activations", "temporaries", "batch")
