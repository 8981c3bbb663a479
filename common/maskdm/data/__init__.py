"""Images in: sources → one policy for pixels → a packed corpus → a site's slice → batches.

sources, archives, layouts, external   what is read
pixels, dicom                          how it becomes pixels
corpus, packing, cache                 the packed form
groups, duplicates, slices             which images take part, and on which side
preflight, prepare, options            what a person asks for and is told
batches                                what training sees; nothing else here imports PyTorch
"""
