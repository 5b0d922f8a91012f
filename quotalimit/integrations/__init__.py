"""Answers to web clients: one module for each framework, which imports it and is imported only when used."""
