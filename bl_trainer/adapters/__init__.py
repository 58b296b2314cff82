"""Any objective in trainers other than `BLTrainer`, a module for each stack, which is imported when it is used."""
