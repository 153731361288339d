"""The ladder: rung after rung, each predicted before it is paid for, a verdict between them."""
