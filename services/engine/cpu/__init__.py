"""Native code for the CPU: matrix products, attention of prompts and of one new token for each of several requests, and what lies between.

What it has over the libraries beneath torch: a row's sum runs in one fixed order, whatever rows are beside it, so a batch needs no
padding (invariant I7); weights that are 16-bit numbers are read as such, even where the model computes in float32; and a layer's
attention is one call for all requests.
"""

#: Changes with the bits that the code here gives; what was found out about shapes with another version does not count.
ROW_PRODUCTS = "4"
