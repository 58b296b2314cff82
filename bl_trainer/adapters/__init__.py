"""Any objective in trainers other than `BLTrainer`. Each module imports its stack when used; docs/adapters has a page for each."""
