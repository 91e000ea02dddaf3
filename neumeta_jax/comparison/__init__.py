"""Other ways to a family of sizes than one INR, on the same data, teacher and budget.

The budget is a number of training images that are drawn. An image counts once, however many sizes
of shared weights it passes through in a step; networks that are trained one by one see as many
each. Where the sizes of a step have images of their own, as in NeuMeta and HTTY, each sees its
part.

    individual              a network per size, from scratch
    slimmable               shared kernels, batch norm for each of four widths (arXiv 1812.08928)
    universally_slimmable   all shared, statistics measured after training (arXiv 1903.05134)
    pruning                 the teacher without its least important channels (arXiv 1906.10771)
    pruning_finetuned       the same, each size trained on
    inr                     a recipe of train.py, the papers' or this project's
"""
