"""One connection that stays open: for each line of standard input a request, and the status of the answer, 200 or an error."""
import http.client
import sys

connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=15)
connection.auto_open = 1
for number, _ in enumerate(sys.stdin):
    try:
        connection.request("GET", "/held-%d" % number)
        response = connection.getresponse()
        response.read()
        # A second connection would hide that the first one is gone.
        connection.auto_open = 0
        print(response.status)
    except Exception as error:
        print(repr(error))
