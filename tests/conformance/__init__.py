"""One set of tests, run against every backend that is present: a user cannot tell them apart but by speed."""
