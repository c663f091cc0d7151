"""Read tokens that are dispatched to buffers of limited capacity, and prove what the rewrite needs.

find      the two products of experts between a dispatch and a combine product
experts   one of them
apart     experts that are called one by one, written as one product on all buffers
dataflow  where values come from, one step at a time
writes    rows of a tensor that are written one by one
terms     a value as a sum of products, and what holds where it is not zero
counts    how many ones a mask has up to a token, or before it
ranks     a token's position in its expert's buffer, as a count
slots     the proof that no slot is given to two tokens
bounds    which weights are never negative, and which at most one
routes    the model's ids, and what a token's weights are made of
"""
