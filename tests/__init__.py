"""Tests, laid out as the folders they test. A package, so that worker processes can import them."""
