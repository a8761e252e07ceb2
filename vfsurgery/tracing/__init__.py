"""From a model to an ``fx`` graph with shapes: the tracer, example inputs, and the view of one op given to rules."""
