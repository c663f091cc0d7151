"""Learn what a module computes by running it, where Dynamo cannot see it in one piece.

Loops over experts with `torch.where`, `.tolist()` or `if n == 0` break a Dynamo graph, and where
they do not, they unroll into dozens of nodes for each expert. Such a module is run once on small
random inputs instead and every torch call is recorded (`recorder`), its experts replaced by
stand-ins (`stand_ins`) or, where they are slices of parameters, found in the recording (`slices`).
What one expert computes is read from its products (`expert`, `products`). Which recorded values are
the hidden states, the ids, the weights and the weighted sum follows from the numbers (`explain`),
and what lies between is checked for structure (`left_out`). The recording with the loop replaced by
one call becomes the module's function (`rewrite`), once it gives what the module gives on other
inputs (`block`, `inputs`).
"""
