"""Read a block as two products over axes with an activation between them, in whatever spelling.

factor, rearranged, selected, sorting    from a value back to what it was made of
contraction                              the factors of a value that is a product
match, experts                           which factors are tokens, matrices, weights
gates, choice                            why gates of all experts are zero but for a few
assemble                                 a block of it all
candidates                               where to look at all
"""
