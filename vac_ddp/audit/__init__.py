"""What in a data set would spoil a result: findings and their report."""
