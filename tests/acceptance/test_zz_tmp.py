import tests.acceptance.test_quickstart as t
t.PAGE=t.PAGE.replace("with Client.from_env() as client:","raise SystemExit(3)\nwith Client.from_env() as client:")
from tests.acceptance.test_quickstart import *
