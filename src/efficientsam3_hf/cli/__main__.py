"""`python -m efficientsam3_hf.cli`, which `accelerate launch -m` runs as well."""

from .app import main

if __name__ == "__main__":
    main()
