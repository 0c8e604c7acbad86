"""Networks and operators as they are usually written: what this project is compared with."""
