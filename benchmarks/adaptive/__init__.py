"""A small diffusion whose noise schedule is learned, per pixel and per picture, or not: four variants to compare.

After Sahoo et al. 2024 (MuLAN) and Kingma et al. 2021 (VDM): trained with the variational bound, on Fashion-MNIST at
16x16. `python -m benchmarks.adaptive.train --variant polynomial-latent --seed 0` trains one;
`python -m benchmarks run adaptive-noise` all eight, and compares them.
"""
