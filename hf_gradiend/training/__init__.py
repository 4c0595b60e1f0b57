"""Training a GRADIEND: arguments, trainer and the two solvers."""
