"""What the TPU compiler says of a step before any TPU is rented: fit, traffic, roofline."""
