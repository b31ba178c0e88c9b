"""Native decode steps for the CPU: matrix products of few rows, and attention of one new token for each of several requests.

What they have over the libraries beneath torch: a row's sum runs in one fixed order, whatever rows are beside it, so a decode batch
needs no padding (invariant I7); weights that are 16-bit numbers are read as such, even where the model computes in float32; and a
layer's attention is one call for all requests.
"""

#: Changes with the bits that the code here gives; what was found out about shapes with another version does not count.
ROW_PRODUCTS = "3"
