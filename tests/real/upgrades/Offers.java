import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;

/** Sends requests as a default HttpClient does, which offers h2c, and prints a line for each answer. */
public class Offers {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int number = 0; number < 4; number++) {
            var request = HttpRequest.newBuilder(URI.create(arguments[0] + "/" + number));
            if (number % 2 == 0)
                request.header("Idempotency-Key", "java-" + number).POST(HttpRequest.BodyPublishers.ofString("{}"));
            var answer = client.send(request.build(), BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.version() + " " + answer.body());
        }
    }
}
