module proof-of-stake

go 1.25.0

require (
	github.com/davecgh/go-spew v1.1.1
	github.com/joho/godotenv v1.5.1
)
