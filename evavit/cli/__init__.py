"""The programs: each module has the `main` of the script of its name, `scripts` what starts them."""
