"""The passes: graph to graph, one a file, in the order of `pipeline.PIPELINE`."""
