"""Who trains: worker processes or threads that wait for jobs. They know no server and no study."""
